"""Fits a capsule to a model's own keys and values: collect (collect, images), fit (fit_pca, fit_retain), choose rows (schedule), write (trainer)."""
