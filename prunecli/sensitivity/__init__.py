"""What every width of every cut unit costs the model, measured without labels."""
