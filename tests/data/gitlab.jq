# GitLab: GET /personal_access_tokens (an administrator's), and GET /users for the addresses. Several pages may follow
# each other in each file. GitLab's tokens end when the day that it names begins, in UTC.
#
#   jq -c --slurpfile users users.json -f gitlab.jq tokens.json | lapsed token import - --source gitlab
($ARGS.named.users // [] | flatten | INDEX(.id)) as $users
| .[]
| $users[.user_id | tostring] as $user
| {
    owner: ($user.username // "gitlab-user-\(.user_id)"),
    emails: $user.email,
    description: .name,
    expires_at: (.expires_at | if . then "\(.)T00:00:00Z" else null end),
    external_id: .id,
    created_at: .created_at,
    last_used_at: .last_used_at,
    revoked_at: (if .revoked then now | floor | todate else null end)
  }
