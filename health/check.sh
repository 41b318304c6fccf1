# shellcheck shell=bash disable=SC2154 # value is entrypoint.sh's
# Sourced for `entrypoint.sh healthcheck`, the image's HEALTHCHECK: exit 0 for /ping's 200 (ready) and 204 (not yet), else 1.
# The entrypoint does it because it alone knows which port it is, with .env and platforms counted in.
trap '' PIPE # who hangs up on us is unhealthy, which is for us to say
case ${value[HOST]:-::} in 0.0.0.0 | ::) host=127.0.0.1 ;; *) host=${value[HOST]} ;; esac
{
    printf 'GET /ping HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' "$host" >&3
    IFS=' ' read -r -t 2 _ status _ <&3
} 3<>"/dev/tcp/$host/${value[PORT_HEALTH]}" || status='no answer'
echo "$host:${value[PORT_HEALTH]}/ping: $status"
[[ $status == 20[04] ]] && exit 0
exit 1
