"""The kinds of memory: what a text's slots are made of. `reading` makes the first two, `gist` and `pruned` one
each; `encoder` says what they have in common.

| kind | slots | needs |
|---|---|---|
| `beacon` | one for every `ratio` tokens: a beacon's keys and values | a checkpoint with beacon weights |
| `full` | one for every token: the keys and values that reading it leaves | nothing |
| `gist` | those of a gist, written by the model, of every 4096 tokens; one for every `ratio` tokens at most | nothing |
| `pruned` | of those of `full`, in each head one of every `ratio` that repeating the text needs most | nothing |

All are unrotated keys and values under the stock weights of one model, behind the same head: stored, loaded, composed
and asked alike.
"""
