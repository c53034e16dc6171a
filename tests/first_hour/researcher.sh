# A researcher's first hour, with two ImageNet networks: look, measure, stop, resume, compare, report, go on in Python.
# PYTHON and `orthattack` are those of an environment with the extra imagenet; the folder is an empty one.
set -eu

orthattack models efficientnet-lite
orthattack attacks OrthoPGD
orthattack eval --model efficientnet-lite0 efficientnet-lite2 --data imagenet-samples --limit 4 --clean-only

cat > bench.toml <<'SUITE'
eps = ["0.25/255", "4/255"]
steps = 4
batch_size = 2
checks = false
models = ["efficientnet-lite0", "efficientnet-lite2"]
attacks = ["OrthoPGD", "foolbox:LinfPGD"]

[data]
source = "imagenet-samples"
limit = 4
SUITE

# Stop it once a file of results is there, as a queue or Ctrl-C would, and give the same command again.
orthattack eval bench.toml --out runs/bench 2> stopped.txt &
run=$!
while kill -0 "$run" && [ -z "$(find runs/bench/shards -name '*.parquet' 2> /dev/null)" ]; do sleep 0.1; done
kill -TERM "$run"
code=0
wait "$run" || code=$?
[ "$code" = 130 ]
grep "to resume:" stopped.txt
orthattack eval bench.toml --out runs/bench 2> resumed.txt
grep "resuming" resumed.txt

orthattack compare runs/bench:efficientnet-lite0 runs/bench:efficientnet-lite2
orthattack report runs/bench --to page
[ -s page/report.html ]

"$PYTHON" - <<'CODE'
from orthattack import OrthoPGD
from orthattack.eval import Run, load

table = Run.open("runs/bench").table()
rows = table[table["attack"] == "OrthoPGD"]
assert (rows["max_abs_cosine"] <= 1e-6).all() and len(rows) == 4
model, images, labels = load("efficientnet-lite0", "imagenet-samples", limit=2)
result = OrthoPGD(model, eps=4 / 255, steps=4).run(images, labels)
print(result)
CODE
