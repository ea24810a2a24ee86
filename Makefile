# `make demo` and `make test` are all a newcomer needs; each builds .venv first if it is missing or older than its sources.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools

.PHONY: venv demo test test-full test-page test-oldest lint types docs sanitize fuzz torture soak hashes bench validate tables kernel-report first-light first-light-packages clean

# Where the lists of hashes are for this machine, pip takes the files that they name and no others; what follows finds all of it there. They are for Linux on
# x86-64, Python 3.11 and a torch without CUDA: what PyPI's torch brings has not been tried here. Elsewhere versions alone are those of constraints.txt.
HASHES := yes
LISTED = test '$(HASHES)' = yes && $(VENV)/bin/python -c "import platform as p, sys; sys.exit((p.system(), p.machine(), p.python_implementation(), sys.version_info[:2]) != ('Linux', 'x86_64', 'CPython', (3, 11)))" && $(PIP) --dry-run --no-deps `grep -o '^torch==[^ ]*' hashes-demo.txt` 2> /dev/null
REFUSED = { echo 'If a hash does not match, a file is not the one that was published. Where that is meant (an index that builds its own): add HASHES=no'; exit 1; }

venv: $(TOOLS)

$(INSTALLED): setup.py pyproject.toml constraints.txt hashes-demo.txt $(wildcard csrc/cpu/*/* csrc/shared/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@if $(LISTED); then $(PIP) --require-hashes --no-deps -r hashes-demo.txt || $(REFUSED); else echo 'hashes are not checked: hashes-demo.txt is not for this machine'; fi
	$(PIP) --upgrade setuptools wheel ninja
	$(PIP) torch numpy
	$(PIP) --no-build-isolation -e .
	$(VENV)/bin/python -c "from fusedrl.kernels.runtime import native; print('native kernels:', native.capability or 'none: ' + native.reason)"
	touch $@

# What only tests and docs need; fusedrl is there already and is not built again.
$(TOOLS): $(INSTALLED) hashes-tests.txt
	@if $(LISTED); then $(PIP) --require-hashes --no-deps -r hashes-tests.txt || $(REFUSED); fi
	$(PIP) 'fusedrl[test,docs]'
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/fusedrl demo

test: lint types
	$(RUN) -m pytest -n 2 -m "not full and not real and not page" tests

test-full: venv
	$(RUN) -m pytest -n 2 tests

# The page of a run in a real browser: chromium on the PATH, or one of playwright's. It skips, with a reason, where there is none.
test-page: venv
	$(PIP) 'fusedrl[page]'
	$(RUN) -m pytest -rs -m page tests

# The GPU kernels, interpreted and compiled, under the oldest Triton that pyproject.toml allows: machines with GPUs are often behind.
# Its interpreter does not run with numpy 2.4 or later. What else they need comes from .venv.
OLDEST := .venv-oldest
test-oldest: venv
	test -x $(OLDEST)/bin/python || $(VENV)/bin/python -m venv $(OLDEST)
	$(OLDEST)/bin/python -c "import pathlib, sysconfig; own = pathlib.Path(sysconfig.get_path('purelib')); beside = pathlib.Path('$(abspath $(VENV))', *own.parts[-3:]); (own / 'beside.pth').write_text(f'import site; site.addsitedir({str(beside)!r})')"
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check --no-deps 'triton==3.6.*' 'numpy<2.4'
	$(OLDEST)/bin/python -c "import numpy, torch, triton; print('torch', torch.__version__, 'triton', triton.__version__, 'numpy', numpy.__version__)"
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 -m "not full and not real and not page" -k "triton or offline" tests/kernels

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of their own: the build (6 minutes on one core), the kernels' suites, and
# a fuzzer of calls for FUZZ_MINUTES. It needs gcc's libasan, which Debian's gcc brings.
FUZZ_MINUTES := 10
sanitize: venv
	$(VENV)/bin/python setup.py -q build --build-lib build/sanitized --build-temp build/sanitized-objects build_ext --sanitize address,undefined
	$(VENV)/bin/python -m tests.support.sanitized build/sanitized --minutes $(FUZZ_MINUTES)

# Fuzzers of the files that others write, guided by coverage, FUZZ_MINUTES each.
fuzz: venv
	$(PIP) atheris
	for target in config safetensors index tokenizer gguf adapter lines manifest; do $(RUN) -m tests.support.fuzz_files run $$target --minutes $(FUZZ_MINUTES) || exit 1; done

# Whole runs whose k-th file call fails, is cut short, late, or the last before power is lost: every k. `make torture STAGES=sft` tries one stage.
STAGES := sft,reward,dpo,rejection,grpo,ppo
torture: venv
	$(RUN) -m tests.support.torture --stages $(STAGES)

# 5,000 steps with everything on, watched from outside, and once more with 20 kills.
soak: venv
	$(RUN) -m tests.support.soak runs/soak --steps 5000 --resumes 20

# Writes the lists of hashes anew, at the versions of constraints.txt: for the demo, and for tests and docs. Where torch without CUDA lies in a folder of wheels:
# `make hashes TORCH="--find-links FOLDER"`.
TORCH := --torch-backend cpu
COMPILE := $(VENV)/bin/uv pip compile -q --generate-hashes --no-annotate --custom-compile-command 'make hashes' --python-version 3.11.5 --python-platform x86_64-manylinux_2_28 $(TORCH) -c constraints.txt pyproject.toml -
hashes: venv
	$(PIP) uv
	printf 'setuptools\nwheel\nninja\n' | $(COMPILE) -o hashes-demo.txt
	printf 'setuptools\nwheel\nninja\n' | $(COMPILE) --extra test --extra docs -o hashes-tests.txt

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check -q .

types: venv
	$(VENV)/bin/mypy -p fusedrl.kernels -p fusedrl.engine

# The pages of docs/ and an API reference, in build/site. The extra `docs` is part of `make venv`
# (10 s), so that `make test` builds the site, too (10 s).
docs: venv
	$(VENV)/bin/mkdocs build --strict

# `make bench BENCH="bench/bench_gae.py -k 2048"` runs some; the rows of the others stay as they are.
# malloc keeps what contestants free (bench/harness.py says why).
BENCH := bench
bench: venv
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 $(RUN) -m pytest $(BENCH) --benchmark-enable --benchmark-columns=median,iqr,rounds --results bench/results -s

# The real runs of docs/results.md, an hour on two cores; `make validate STUDIES=arithmetic` runs some.
STUDIES :=
validate: venv
	$(RUN) -m bench.validation $(STUDIES)

tables: venv
	$(RUN) -m bench.tables

kernel-report: venv
	$(RUN) -m bench.kernel_report

# The first minutes on a new machine, from a checkout that may have nothing installed: three parts of at most eight minutes. `make first-light DEVICE=cpu`
# rehearses them (MINUTES=30 on a slow machine); `make first-light PARTS=truth` runs one. `make first-light-packages` fetches what its suites and contests
# need beside torch; build/first-light can be copied to a machine without a network.
DEVICE ?= cuda
OUT ?= runs/first-light
MINUTES ?= 8
PARTS := truth engine kernels
first-light-packages:
	$(PYTHON) -m pip install -q --disable-pip-version-check --no-deps --upgrade --target build/first-light/packages pytest pytest-benchmark py-cpuinfo pluggy iniconfig packaging pygments hypothesis sortedcontainers liger-kernel

first-light:
	failed=0; for part in $(PARTS); do $(firstword $(wildcard $(VENV)/bin/python) $(PYTHON)) bench/first_light.py $$part --device $(DEVICE) --out $(OUT) --minutes $(MINUTES) || failed=1; done; exit $$failed

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info kernels/*.so
