"""Encoders of images, one file for each family of models that reads them."""
