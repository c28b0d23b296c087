"""Measurements of the tool, in folders by what they show."""
