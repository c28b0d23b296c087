"""From scores to a proven plan."""
