"""The page of the study and its plots, from saved results alone: rendering never measures.

    page.py    the whole page; what results there are, and where they lie
    parts.py   Markdown tables and figures of speech
    plots.py   one style for all plots
    layout.py, reuse.py, fragmentation.py, paging.py, tradeoffs.py
               the sections of questions 1 to 5

Imports matplotlib and the standard library.
"""
