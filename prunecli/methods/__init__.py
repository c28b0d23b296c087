"""Methods that train before the cut, a paper a file."""
