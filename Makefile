# Two commands do all the set-up: `make report` and `make test`. `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help report test faults docs lab export clean
.DEFAULT_GOAL := help

help:            ## list the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

report: $(INSTALLED)   ## train the demos of the studies on this machine (some minutes on two CPU cores) and render their papers
	$(BIN)/speedrun sweep params/sweeps/cifar_demo.yaml
	$(BIN)/speedrun sweep params/sweeps/gpt_demo.yaml
	$(BIN)/speedrun render --profile demo

test: $(INSTALLED)     ## everything that CI checks; changes nothing in the tree
	$(BIN)/python tests/check_tree.py
	$(BIN)/python tests/check_style.py
	$(BIN)/python tests/save_outputs.py --check
	$(BIN)/ruff check .
	$(BIN)/nbdev_test
	$(BIN)/pytest

faults: $(INSTALLED)   ## kill the processes of small sweeps at random moments, fifty rounds; half an hour on two CPU cores
	$(BIN)/python tests/faults.py --rounds 50

lab: $(INSTALLED)      ## JupyterLab, for exploring
	$(BIN)/pip install -q -c constraints.txt -e '.[lab]'
	$(BIN)/jupyter lab nbs

export: $(INSTALLED)   ## after editing notebooks: write the package, clean the notebooks, save what they show
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/save_outputs.py
	$(BIN)/nbdev_clean

docs: $(INSTALLED)     ## the documentation site, where Quarto is present
	@command -v quarto > /dev/null || { echo "make docs needs Quarto on the PATH: https://quarto.org/docs/get-started"; exit 1; }
	$(BIN)/nbdev_docs

clean:                 ## remove what can be made again; keeps outputs/
	rm -rf .venv paper/_output _docs _proc build *.egg-info

$(INSTALLED): constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
