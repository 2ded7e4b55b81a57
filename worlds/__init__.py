"""Places to act in. A world is a class with what follows; a row of `loop.WORLDS` gives it its name.

    offers(suite) -> (tasks, domains)    static. SUITE of `--world NAME:SUITE`, "" is the usual one;
                                         tasks: what is demonstrated; domains: how evaluations may
                                         differ, "in" first; LookupError(unknown word, known words)
    World(suite, size, wrist_size)       pixels of the first camera's side and of the others'
    reset(seed, task=None, domain="in")  begins an episode -> observation. Equal arguments give
                                         equal episodes; no task: one of the suite's, by the seed
    observe()                            -> {"images": {camera: (h, w, 3) uint8}, "state": (S,)
                                         float32, of which the last tells how open the hand is}
    step(action)                         (A,), as demonstrated; above 0 the last opens the hand
    success, instruction, max_steps      reached by now; in words; steps that an episode may take
    task                                 the present one of the suite's tasks
    expert(seed, noise)                  -> who demonstrates: act() -> action, then `reasoning`, a
                                         sentence, and `phase`, the number of its sub-goal
    slow, fps                            spread over processes when acted in; steps in a second

S, A, the cameras and their sizes are the world's choice: models take them from the data. A world
may have more: `untouched(suite, domain)`, static, the tasks that a domain leaves as demonstrated,
so that none of its evaluations takes them; `chain(seed)` and `next_goal()` for goals in a row;
`state_dict()` and `load_state_dict()` for the offline judge of the VLA Score.
"""
