"""Use of a trained network: in Python, for predictions on folders of images, and as an exported program."""
