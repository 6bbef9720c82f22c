"""Tensor operations behind one interface each: reference.py in torch, triton.py beside it.

Imported as ``sglang_vericache.kernels``. Only torch and triton here.
"""
