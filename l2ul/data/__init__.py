"""Data sets, image folders, forget sets, augmentation and mixes.

Images are uint8 pixels. `images.as_pixels` converts them to the float pixels in [0,1] that models take. Small data sets
are tensors on the device; image folders stay on disk and are decoded batch by batch.
"""
