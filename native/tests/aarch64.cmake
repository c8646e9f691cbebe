# A toolchain file: builds for AArch64 on another machine and runs the tests in an emulator (see `make test-neon`).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)  # so that the emulator needs no libraries of that system
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
