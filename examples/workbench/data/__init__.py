"""The images of a run: folders and scenes, augmentation, batches from several domains, and a check of the files."""
