#!/bin/sh
# Runs the test programs named on the command line and the end-to-end test, and adds up their counts.
passed=0 failed=0 skipped=0
export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=10000

tally() { # "5 passed 0 failed 1 skipped"
    passed=$((passed + $1))
    failed=$((failed + $3))
    skipped=$((skipped + ${5:-0}))
}

for program in "$@" "sh test/headers.sh" "sh test/end_to_end.sh" "sh test/bad_input.sh" "sh test/processes.sh"; do
    output=$($program 2>&1)
    status=$?
    last=$(printf '%s\n' "$output" | tail -n 1)
    echo "$program: $last"
    printf '%s\n' "$output" | grep "skipped:"
    case $last in
    *" passed, 0 failed"*) [ $status -eq 0 ] || last="0 passed, 1 failed" ;;
    *" passed, "*" failed"*) ;;
    *) last="0 passed, 1 failed" ;;
    esac
    [ $status -eq 0 ] || printf '%s\n' "$output" | tail -n 30
    tally $(printf '%s\n' "$last" | tr -d ,)
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
