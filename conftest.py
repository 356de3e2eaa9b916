"""Puts the project's root on the import path, so that `pytest` finds mmdit, vae, ... from anywhere."""
