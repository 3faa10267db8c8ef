"""Applications on a device: texts and pictures in, labels, spans and vectors out.

They need NumPy, the runtime of the bundle, ``tokenizers`` for texts and Pillow for pictures.
"""
