"""Fits a capsule to a model's own keys and values.

    images     drawn pictures                          collect      a running model's keys and values
    coded      pictures in every type at once          tables       of bits, for a budget
    cross      axes of the other pictures              fit_tiles    all of it in order
    arrays     `fit_capsule`, for keys and values of one's own
"""
