"""Tensor operations behind one interface each: reference.py in torch, triton.py beside it.

Imported as ``sglang_vericache.kernels``. Only torch and triton here.
"""

if __name__ == "kernels":
    # SGLang depends on a distribution of this name; a checkout as working directory hides it.
    raise ImportError(
        "this folder is sglang_vericache.kernels: start Python outside the checkout, or with -P"
    )
