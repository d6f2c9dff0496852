"""Fine-tuning a language model on labelled texts, by MeZO's protocol (Malladi et al., arXiv 2305.17333).

From the texts to the table: `texts` reads and splits them, `language_model` loads a transformers model and makes tokens
of texts by a prompt, `frozen` runs the blocks that do not train once and keeps what they put out on disk, `classifier`
is the rest of the model with its read-out, `parameters` chooses what trains, `zeroth_order` and `methods` are what
trains it, `training` is one run, `comparison` all of them.
"""
