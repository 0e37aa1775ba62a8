"""The segmenters: a small one, EfficientNet-Lite0, DeepLab-v2 and SegFormer, and the loading of pretrained weights."""
