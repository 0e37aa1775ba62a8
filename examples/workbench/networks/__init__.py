"""The segmenters: a small one, DeepLab-v2 and SegFormer, and how trained weights are loaded into them."""
