"""What crosses a file or a stage: frozen values, no torch."""
