"""Images of a run: folders and scenes, augmentation, batches of several domains, and a check of the files."""
