"""What the user asks for: targets, settings, recipes and reading them."""
