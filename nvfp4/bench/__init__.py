"""Measuring on the machine at hand, and predicting other machines.

    cases      the same quantisers, matrices and layers everywhere
    gates      every backend against the reference: nothing is timed that is wrong
    timing     candidates take turns; the median counts; on what machine
    tables     how rows look

    measure -> report                         ``nvfp4 bench all``: measured
    devices, issue -> roofline                what a layer should cost, by peaks and instructions
             -> shares, published             each way of quantising; others' figures beside ours
             -> roofline_report               ``nvfp4 bench roofline``: predicted

A number is measured, predicted or published, and its column says which. ``benchmarks/`` holds
scripts that time with these parts and keep what came out.
"""
