"""Explanations of trained networks and how well they sit on the object (extra [explain]).

`explain` is one call for eight methods, thin adapters over Captum and pytorch-grad-cam; `metrics` scores maps against masks;
`controls` asks whether maps are faithful or merely prettier.
"""

from sib_fast.explain.methods import METHODS, REPORTED, UndefinedMethodError, explain, find_layer

__all__ = ["METHODS", "REPORTED", "UndefinedMethodError", "explain", "find_layer"]
