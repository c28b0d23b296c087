"""Which channels must go together: the dependency graph and the engines that find it."""
