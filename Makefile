# make            train, sample and shortcut
# make MPI=1      the same for many processes: mpirun -n 4 ./train ...
# make flow       SCFM small enough to see: test/flow.c, which writes flow.png
# make test       all tests;  make check: the same under sanitizers;  make bench: speed against PyTorch
# make compare    with diffusers, transformers and peft;  make fuzz: the readers of files, with clang
# The programs use OpenBLAS where it is installed and a plain C product where it is not, and contain
# the CUDA backend where nvcc is found (make NVCC= leaves it out).

ifeq ($(MAKELEVEL),0)
  MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 1)
endif
CC ?= cc
CFLAGS ?= -O3 -march=native
BASE := -std=c99 -pedantic -Wall -Wextra -fno-math-errno -ffp-contract=fast
BASE += $(if $(findstring clang,$(shell $(CC) --version 2>/dev/null)),-Wno-pass-failed)
LIBS := -lm

compiles = $(shell printf '%s\n' '$(1)' 'int main(void) { return 0; }' | $(CC) $(2) -x c - -o /dev/null $(3) 2>/dev/null && echo yes)

ifneq ($(call compiles,,,),yes)
  $(error no working C compiler ($(CC)): install the packages gcc and libc6-dev)
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
else
  $(info OpenMP is missing, using one core; for more install the package libomp-dev)
endif

# Compute capability 8.x and, where this nvcc knows them, 8.9 (it rounds to e4m3), 9.0 (a: with what only
# this chip has) and 12.0; others by the driver's compiler.
NVCC ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
chip = $(shell $(NVCC) -gencode arch=compute_$(1),code=sm_$(1) --dryrun -x cu -c /dev/null >/dev/null 2>&1 && echo '-gencode arch=compute_$(1),code=sm_$(1)')
CUDA_ARCH ?= -gencode arch=compute_80,code=[sm_80,compute_80] $(call chip,89) $(or $(call chip,90a),$(call chip,90)) $(call chip,120)
comma := ,
ifneq ($(NVCC),)
  # NVIDIA's own packages have lib64, conda's and pip's lib; Debian's are where the linker looks.
  CUDA_ROOT := $(patsubst %/bin/,%,$(dir $(realpath $(shell command -v $(NVCC)))))
  CUDA_LIB := $(patsubst %/libcudart_static.a,%,$(firstword $(wildcard $(CUDA_ROOT)/lib64/libcudart_static.a $(CUDA_ROOT)/lib/libcudart_static.a)))
  CUDA_OBJECT := build/shortcut_cuda.o
  CUDA_LINK := -DSHORTCUT_CUDA $(CUDA_OBJECT) $(if $(CUDA_LIB),-L$(CUDA_LIB) -Wl$(comma)-rpath$(comma)$(CUDA_LIB)) -lcudart_static -ldl -lpthread -lrt
endif

# MPI's headers and library, as its own compiler would have them, where they are asked for.
MPI_FLAGS = -DSHORTCUT_MPI $(wordlist 2,99,$(shell mpicc -show 2>/dev/null))
ifneq ($(MPI),)
  WITH_MPI := $(if $(call compiles,#include <mpi.h>,,$(MPI_FLAGS)),$(MPI_FLAGS),$(error \
    MPI=1 needs mpicc: install the packages openmpi-bin and libopenmpi-dev (or mpich)))
  CUDA_LINK += $(if $(NVCC),-lnccl)
endif

PROGRAMS := train sample shortcut
MPI_PROGRAMS := $(PROGRAMS:%=build/mpi/%)
TESTS := $(patsubst test/test_%.c,build/test_%,$(wildcard test/test_*.c)) $(if $(shell command -v $(CXX)),build/test_cuda_emulated) build/test_ops_plain build/test_flux_plain
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined

all: $(PROGRAMS)

# The implementation once; the programs see the declarations alone.
build/shortcut.o: shortcut.h | build
	$(CC) $(BASE) $(CFLAGS) -DSHORTCUT_IMPLEMENTATION -x c -c $< -o $@
train build/mpi/train: train.c
sample build/mpi/sample: sample.c
shortcut build/mpi/shortcut: main.c
$(PROGRAMS): shortcut.h tools.h build/shortcut.o $(CUDA_OBJECT) build/mpi/asked
	$(CC) $(BASE) $(CFLAGS) $(filter %.c,$^) build/shortcut.o -o $@ $(CUDA_LINK) $(LIBS) $(WITH_MPI)
build/shortcut_cuda.o: shortcut_cuda.cu shortcut.h build/mpi/asked
	$(NVCC) -O3 -std=c++17 --threads 2 $(CUDA_ARCH) $(if $(MPI),-DSHORTCUT_MPI) -Xcompiler -Wall,-fno-exceptions,-fno-threadsafe-statics -c $< -o $@
# For the tests, beside programs without: on the CPU, and on the imitation of CUDA with one of NCCL.
$(MPI_PROGRAMS): shortcut.h tools.h build/shortcut.o build/mpi/asked
	$(CC) $(BASE) $(CFLAGS) $(filter %.c,$^) build/shortcut.o -o $@ $(LIBS) $(MPI_FLAGS)
build/mpi/train_emulated: train.c shortcut.h tools.h build/shortcut.o build/mpi/emulated.o
	$(CC) $(BASE) -DSHORTCUT_CUDA $(CFLAGS) $< build/shortcut.o build/mpi/emulated.o -o $@ -lstdc++ -lpthread $(LIBS) $(MPI_FLAGS)
build/mpi/asked: always # changes when what was asked for does
	@mkdir -p build/mpi
	@echo "MPI=$(MPI)" | cmp -s - $@ || echo "MPI=$(MPI)" >$@

build:
	mkdir -p build
build/test_%: test/test_%.c test/test.h test/dit.h test/fuzz.h shortcut.h tools.h | build
	$(CC) $(BASE) -Wno-unused-function $(CFLAGS) $< -o $@ $(LIBS)
build/test_mixture: test/flow.c test/draw.h
build/flow: test/flow.c test/draw.h shortcut.h tools.h | build
	$(CC) $(BASE) -Wno-unused-function $(CFLAGS) $< -o $@ $(LIBS)
build/encode build/gradients build/vae_at_size: build/%: test/%.c shortcut.h | build
	$(CC) $(BASE) $(CFLAGS) $< -o $@ $(LIBS)
# The same tests of a build with plain C products, on one thread.
build/test_%_plain: test/test_%.c test/test.h test/dit.h shortcut.h tools.h | build
	$(CC) -std=c99 -pedantic -Wall -Wextra -Wno-unused-function $(CFLAGS) $< -o $@ -lm
build/test_cuda: test/test_cuda.c test/test.h shortcut.h $(CUDA_OBJECT) | build
	$(CC) $(BASE) -Wno-unused-function $(CFLAGS) $< -o $@ $(CUDA_LINK) $(LIBS)
# The CUDA file as plain C++, on a small imitation of CUDA: its test, and the programs on it (slow; the
# way back is make clean all).
build/mpi/emulated.o: WITH_MPI = $(MPI_FLAGS)
build/emulated.o build/mpi/emulated.o: shortcut_cuda.cu shortcut.h $(wildcard test/emulation/*.h) build/mpi/asked
	$(CXX) -std=c++17 -O2 -Wall -Wextra -Wno-unknown-pragmas $(filter -fsanitize% -fno-sanitize%,$(CFLAGS)) -Itest/emulation -I. -x c++ -c $< -o $@ $(WITH_MPI)
build/test_cuda_emulated: test/test_cuda.c test/test.h shortcut.h build/emulated.o
	$(CC) $(BASE) -Wno-unused-function -DEMULATED $(CFLAGS) $< build/emulated.o -o $@ -lstdc++ -lpthread $(LIBS)
emulated: clean
	$(MAKE) --no-print-directory CUDA_OBJECT=build/emulated.o CUDA_LINK='-DSHORTCUT_CUDA build/emulated.o -lstdc++ -lpthread' all

flow: build/flow
	build/flow

test: $(PROGRAMS) $(TESTS) $(if $(shell command -v mpicc && command -v mpirun),$(MPI_PROGRAMS) $(if $(shell command -v $(CXX)),build/mpi/train_emulated))
	sh test/run.sh $(TESTS)

# Without the first option clang 14's search for leaks may crash in its own list of threads' memory,
# without the second CUDA cannot start; leaks.txt names its libraries, which do not free everything.
check:
	$(MAKE) --no-print-directory clean
	ASAN_OPTIONS="intercept_tls_get_addr=0:protect_shadow_gap=0:$$ASAN_OPTIONS" \
	LSAN_OPTIONS="suppressions=$(CURDIR)/test/leaks.txt:print_suppressions=0:$$LSAN_OPTIONS" \
	EMULATED_SEEDS=4 $(MAKE) --no-print-directory CFLAGS="$(SANITIZE)" test
	$(MAKE) --no-print-directory clean
	CC="$(CC)" sh test/faults.sh "$(CXX)"
	$(MAKE) --no-print-directory all

# The GPU against its ceilings, at FLUX.1-dev's full size, and against PyTorch where it is installed.
bench-cuda: build/bench_cuda train
	build/bench_cuda
	python3 test/bench_cuda.py
build/bench_cuda: test/bench_cuda.c shortcut.h $(CUDA_OBJECT) | build
	$(if $(NVCC),,$(error bench-cuda needs nvcc))$(CC) $(BASE) -Wno-unused-function $(CFLAGS) $< -o $@ $(CUDA_LINK) $(LIBS)

# What a machine with a driver and cuBLAS needs, no compiler, stb or network: build/kit, for processors
# with AVX2, with plain C products and the OpenMP library beside the programs (its glibc must not be
# older than this one's). There: sh test/cuda_session.sh
KIT := $(filter-out -DSHORTCUT_OPENBLAS,$(BASE)) -Wno-unused-function -O3 -march=x86-64-v3
KIT_LINK := $(filter-out -Wl$(comma)-rpath%,$(CUDA_LINK)) -lm -Wl,-rpath,'$$ORIGIN/lib:$$ORIGIN/../lib' -s
cuda-kit: $(CUDA_OBJECT)
	$(if $(NVCC),,$(error cuda-kit needs nvcc))rm -rf build/kit
	mkdir -p build/kit/build build/kit/lib build/kit/test
	$(CC) $(KIT) -DSHORTCUT_IMPLEMENTATION -x c -c shortcut.h -o build/kit.o
	for i in train sample main; do $(CC) $(KIT) $$i.c build/kit.o -o build/kit/$$i $(KIT_LINK) || exit 1; done
	for i in test_cuda bench_cuda; do $(CC) $(KIT) test/$$i.c -o build/kit/build/$$i $(KIT_LINK) || exit 1; done
	mv build/kit/main build/kit/shortcut
	ldd build/kit/train | awk '/libgomp|libomp/ {print $$3}' | xargs -r cp -L -t build/kit/lib
	cp README.md LICENSE build/kit
	ln -s ../../data build/kit # cp -rL takes it along
	cp test/cuda_session.sh test/bench_cuda.py test/cuda-log.md build/kit/test
	@du -sm build/kit | awk '{ print "build/kit:", $$1, "MiB without data"; exit $$1 > 32 }'

bench: $(PROGRAMS)
	python3 test/bench.py

# Against diffusers, transformers and peft (test/reference/requirements.txt), with FLUX.1's own
# tokenizers where SHORTCUT_FLUX_DIR is its folder, and with ComfyUI where COMFYUI is (and python3 has
# its packages).
compare: $(PROGRAMS)
	@python3 -c 'import torch, diffusers, transformers, peft, safetensors, PIL' 2>/dev/null || \
	    { echo "error: make compare needs PyTorch: pip install -r test/reference/requirements.txt"; exit 1; }
	python3 test/compare_diffusers.py
	python3 test/compare_formats.py
	python3 test/compare_sd3.py
	python3 test/compare_pictures.py
	python3 test/compare_vae.py 256 384
	python3 test/compare_tokenizers.py $(or $(SHORTCUT_FLUX_DIR),data/tiny-flux)
	$(if $(COMFYUI),python3 test/compare_comfyui.py $(COMFYUI),@echo "ComfyUI: skipped: COMFYUI=FOLDER names a clone of it")

clean:
	rm -rf build $(PROGRAMS)

# Ten minutes for each reader of files, with clang's libFuzzer; what it finds is left in build/.
FUZZ_SECONDS ?= 600
fuzz: build/fuzz_json build/fuzz_safetensors build/fuzz_tokenizer
	for name in json safetensors tokenizer; do mkdir -p build/corpus/$$name && \
	    build/fuzz_$$name -max_len=4096 -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/$$name- \
	        build/corpus/$$name test/corpus/$$name || exit 1; done
build/fuzz_%: test/fuzz_%.c test/fuzz.h shortcut.h | build
	clang -std=c99 -g -O1 -fsanitize=fuzzer,address,undefined $< -o $@ -lm

.PHONY: always all flow test emulated check compare fuzz bench bench-cuda cuda-kit clean
