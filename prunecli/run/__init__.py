"""Jobs, their stages and the run folder."""
