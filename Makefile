# make            train, sample and shortcut
# make test       all tests;  make check: the same under sanitizers;  make bench: speed against PyTorch
# The programs use OpenBLAS where it is installed and a plain C product where it is not.

CC ?= cc
CFLAGS ?= -O3 -march=native
BASE := -std=c99 -pedantic -Wall -Wextra -fno-math-errno -ffp-contract=fast
BASE += $(if $(findstring clang,$(shell $(CC) --version)),-Wno-pass-failed)
LIBS := -lm

compiles = $(shell printf '%s\n' '$(1)' 'int main(void) { return 0; }' | $(CC) $(2) -x c - -o /dev/null $(3) 2>/dev/null && echo yes)

ifneq ($(call compiles,,,),yes)
  $(error no C compiler: install the package gcc)
endif
ifneq ($(call compiles,#include <stb/stb_image.h>,,),yes)
  $(error stb is missing: install the package libstb-dev)
endif
ifeq ($(call compiles,#include <cblas.h>,,-lopenblas),yes)
  BASE += -DSHORTCUT_OPENBLAS
  LIBS := -lopenblas $(LIBS)
else
  $(info OpenBLAS is missing, using plain C products; for speed install the package libopenblas-dev)
endif
ifeq ($(call compiles,#include <omp.h>,-fopenmp,),yes)
  BASE += -fopenmp
endif

PROGRAMS := train sample shortcut
TESTS := $(patsubst test/test_%.c,build/test_%,$(wildcard test/test_*.c))
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined

all: $(PROGRAMS)

train sample: %: %.c shortcut.h
	$(CC) $(BASE) $(CFLAGS) $< -o $@ $(LIBS)
shortcut: main.c shortcut.h
	$(CC) $(BASE) $(CFLAGS) $< -o $@ $(LIBS)

build:
	mkdir -p build
build/test_%: test/test_%.c test/test.h shortcut.h | build
	$(CC) $(BASE) -Wno-unused-function $(CFLAGS) $< -o $@ $(LIBS)

test: $(PROGRAMS) $(TESTS)
	sh test/run.sh $(TESTS)

check: CFLAGS := $(SANITIZE)
check:
	$(MAKE) --no-print-directory clean
	$(MAKE) --no-print-directory CFLAGS="$(SANITIZE)" test
	$(MAKE) --no-print-directory clean

bench: $(PROGRAMS)
	python3 test/bench.py

clean:
	rm -rf build $(PROGRAMS)

.PHONY: all test check bench clean
