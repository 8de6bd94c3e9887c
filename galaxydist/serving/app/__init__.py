"""The app that labels pictures with published models, also as a Space of its own.

These modules import numpy, Pillow, onnxruntime and gradio, and nothing else of galaxydist: a Space carries them as they are,
without torch. They import each other by relative imports.
"""
