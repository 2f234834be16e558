"""What all programs share.

start       the commands                              program     exit statuses, flags, stdout that is closed or full
interrupts  Ctrl-C                                    errors      one hierarchy, each a line for the user
pictures    pixels from any file                      marker      what stands for a picture in a prompt
projector   whether a projector fits a model          timing      durations and time left
"""
