"""Hugging Face folders and hub ids."""
