#!/usr/bin/env bash
# torch.autocast keeps the weights that it has cast in one cache for all threads, and empties it only when
# some thread leaves its outermost autocast block. So a thread that enters autocast after the weights were
# changed (an optimiser's step, an average of the weights, another checkpoint) may compute with the old
# ones, without a word, as long as another thread is in a block in which it used them.
# torch.inference_mode() instead of no_grad(), or autocast(cache_enabled=False), gives the right values.
#
# Seen 2026-11-30 with torch 2.13.0 (CPU build), autocast("cpu", torch.bfloat16), Python 3.11:
#   no_grad: the second thread has the values of the weights before they were doubled
#   inference_mode: the second thread has the right values
#   no_grad, cache_enabled=False: the second thread has the right values
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/stale.py" <<'PY'
import threading

import torch


def second_is_stale(without_gradients, **options):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 64, bias=False), torch.randn(8, 64)
    used, ended = threading.Event(), threading.Event()
    found = {}

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, **options)

    def first():
        with without_gradients(), autocast():
            found["first"] = layer(x)
            used.set()
            ended.wait()

    def second():
        used.wait()
        with torch.no_grad():
            layer.weight.mul_(2)
        with without_gradients(), autocast():
            found["second"] = layer(x)
        ended.set()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with without_gradients(), autocast():
        right = layer(x)
    stale = torch.equal(found["second"], found["first"])
    assert stale != torch.equal(found["second"], right)
    return stale


assert second_is_stale(torch.no_grad)
print("no_grad: the second thread has the values of the weights before they were doubled")
assert not second_is_stale(torch.inference_mode)
print("inference_mode: the second thread has the right values")
assert not second_is_stale(torch.no_grad, cache_enabled=False)
print("no_grad, cache_enabled=False: the second thread has the right values")
PY
"$folder/venv/bin/python" "$folder/stale.py"
