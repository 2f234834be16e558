"""Fits a capsule to a model's own keys and values.

    images     drawn pictures                          collect      a running model's keys, values and queries
    store      what is kept of them, on disk           source       the same from arrays
    fit_pca    bases and means                         fit_retain   gates, and key MLPs (torch)
    schedule   rows and types for a budget             sensitivity  what an error costs in each layer
    shapes     of the blocks, from all pictures
    guard      its thresholds                          trainer      all of it in order
    arrays     `fit_capsule`, for keys and values of one's own
"""
