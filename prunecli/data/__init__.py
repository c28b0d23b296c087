"""Images: their sources, transforms and loaders."""
