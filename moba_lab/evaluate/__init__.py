"""Measure any causal model of Hugging Face transformers, with MoBA and in full.

`python -m moba_lab.evaluate --help` is the command. Lengths are tokens of the model's
own tokenizer.

    options.py    the command line
    supervise.py  go on where the system killed the process that measures
    subject.py    the model and its tokenizer: load, switch the attention, tokenize
    texts.py      the needle and RULER's tasks as text of a length in tokens
    answers.py    greedy answers and their scores
    losses.py     loss by position, per token and per byte
    prefill.py    time and memory of reading a prompt
    points.py     what is to be measured, one row each, and which rows are there
    run.py        measure what is missing, whatever happens at one point
    statuses.py   how a row and the command end
    tables.py     tables and sentences, from the rows
    report.py     pictures and the page around them
"""
