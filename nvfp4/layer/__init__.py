"""One converted layer: three GEMMs in NVFP4, and what is kept between them.

    forward     x [M, K], w [N, K]  -> codes of both    -> y [M, N]      linear, call, gemms
    kept        codes, 4.5 bits per element                              saved, weight_cache
    backward    dy [M, N]           -> codes, twice     -> dx, dw        gemms
    noise       seeds of (layer, call, GEMM, side, rank)                 noise, call

Start with ``linear.py``, then ``gemms.py``. ``experts.py`` does the same for stacked experts;
``sharding.py`` and ``tensor_parallel.py`` say what changes where a process holds a part;
``lazy_activation.py`` lets a norm or an MLP hand its formula to the layer instead of its values;
``dense.py`` is what runs in high precision.
"""
