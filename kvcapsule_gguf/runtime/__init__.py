"""What all programs share. It needs no other part of the package.

start       the commands                              program     exit statuses, flags, stdout that is closed or full
interrupts  Ctrl-C                                    errors      one hierarchy, each a line for the user
pictures    pixels from any file                      marker      what stands for a picture in a prompt
scratch     temporary folders                         timing      durations and time left
digest      identity of bytes
"""
