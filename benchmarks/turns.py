"""Sides of a comparison that take turns, a step at a time, so that a machine that drifts treats all alike. Each has a
process of its own, with its own memory settings and its own peak."""
import multiprocessing
import time


def _work(make_step, arguments, warm_up, pipe):
    "Make a step whenever asked to; answer with its seconds and what it returned, at last with the peak memory."
    from speedrun_nb.core.clock import peak_memory, reset_peak_memory
    from speedrun_nb.core.device import pick_device

    step = make_step(*arguments)
    for _ in range(warm_up): step()
    reset_peak_memory(pick_device())
    pipe.send("ready")
    while pipe.recv() == "step":
        start = time.perf_counter()
        value = step()
        pipe.send((time.perf_counter() - start, value))
    pipe.send(peak_memory(pick_device()))


def take_turns(sides, steps, warm_up=2):
    """Seconds and values by side, a step each in turn, forwards and backwards, and each side's peak memory in bytes.

    `sides`: name -> (function of a module, its arguments). It returns a step, which waits for its device and returns a
    number."""
    pipes = {name: _start(name, side, warm_up) for name, side in sides.items()}
    seconds, values = {name: [] for name in sides}, {name: [] for name in sides}
    for number in range(steps):
        for name in sides if number % 2 else reversed(sides):
            pipes[name].send("step")
            second, value = _hear(name, pipes[name])
            seconds[name].append(second)
            values[name].append(value)
    for pipe in pipes.values(): pipe.send("stop")
    return seconds, values, {name: _hear(name, pipe) for name, pipe in pipes.items()}


def _start(name, side, warm_up):
    "Start a side and wait until it is warm: sides must not compete while they warm up."
    make_step, arguments = side
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    context.Process(target=_work, args=(make_step, arguments, warm_up, far), daemon=True).start()
    far.close()  # or a side that ends would never be noticed
    _hear(name, pipe)
    return pipe


def _hear(name, pipe):
    "What a side says. Ends everything when it is gone."
    try: return pipe.recv()
    except EOFError: raise SystemExit(f"{name}: its process ended; see above") from None
