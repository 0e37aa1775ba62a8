"""What was trained, in use: a run's network in Python, predictions on folders of images, and exported programs."""
