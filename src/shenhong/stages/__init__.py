"""What a run does: one file a stage or a kind of step, and the plan that puts them in order.

base       Stage, Step and what they are given      plan       the stages of a recipe, in order
corpus, tokenizer, tokens, publish, evaluate, report            stages that are the same in every run
training   what steps that train have in common
pretrain, tune  (later: reinforce, distil, prefer, quantise)   kinds of steps, found by `registry`
init_from  what a run takes over from a model       describe   what a run is, for people and scripts
"""
