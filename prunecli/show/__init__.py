"""Values in, text and pages out: wording, tables, plots, the report page."""
