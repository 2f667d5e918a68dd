# For the tests in shell: counts, and a temporary folder `dir`. Source it; end with `report`.
passed=0 failed=0
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

check() { # description, condition...
    text=$1
    shift
    if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "failed: $text"; fi
}
fails() { # expected exit status, words in the one-line error, command...
    status=$1 words=$2
    shift 2
    "$@" >"$dir/output" 2>&1
    got=$?
    lines=$(grep -a -c '^error:' "$dir/output")
    controls=$(tr -d '\n\r\t\033' <"$dir/output" | LC_ALL=C grep -a -c '[[:cntrl:]]') # progress: \r, ESC [K
    last=$(tail -n 1 "$dir/output" | grep -a -c '^error:\|^usage:')
    if [ $got -eq "$status" ] && [ "$lines" -eq 1 ] && [ "$controls" -eq 0 ] && [ "$last" -eq 1 ] &&
        grep -a '^error:' "$dir/output" | grep -a -q -- "$words"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "failed: '$*' gave $got, $(tail -n 3 "$dir/output" | cat -v)"
    fi
}
quiet() { "$@" >/dev/null 2>&1; }
same() { cmp -s "$1" "$2"; }
not() { ! "$@"; }
differ() { ! cmp -s "$1" "$2"; }
report() {
    echo "$passed passed, $failed failed"
    [ $failed -eq 0 ]
}
