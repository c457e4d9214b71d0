"""From the bytes of an image to what an encoder reads. Nothing here loads torch, and Pillow only for an image."""
