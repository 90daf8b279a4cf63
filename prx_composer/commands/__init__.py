"""What a person types: one module or folder for each `prx` verb. Nothing below imports from here."""
