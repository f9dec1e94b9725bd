"""Tasks with exact answers: what a model must find in a text, and whether it did.

A task is a function of a random generator and a length that makes an `Example`, as
bytes: a byte-level model reads them as they are, any other one after decoding them.

    example.py      Example, and TaskSampler, which makes batches for training
    haystack.py     pieces of real text that consist of whole lines
    definitions.py  the line that defines a name, in source code
    needle.py       a pass key in real text, at a depth
    ruler.py        RULER's tasks that need no corpus; wording.py has their words
    recall.py       multi-query associative recall, over tokens of its own
    scoring.py      exact match, recall of strings, greedy decoding
    routing.py      whether the gate chose the blocks that hold the answer
"""
