# GitHub: GET /orgs/ORG/personal-access-tokens (fine-grained tokens) or GET /orgs/ORG/credential-authorizations (classic
# tokens, where the organisation uses SAML), and {"LOGIN": "ADDRESS"} for the addresses, which GitHub does not tell.
#
#   jq -c --slurpfile emails emails.json -f github.jq tokens.json | lapsed token import - --source github
($ARGS.named.emails // [] | add) as $emails
| .[]
| if has("credential_id") then
    select(.credential_type == "personal access token")
    | {
        owner: .login,
        description: ((.authorized_credential_note // "") | if . == "" then "classic token" else . end),
        expires_at: .authorized_credential_expires_at,
        external_id: "classic-\(.credential_id)",
        created_at: .credential_authorized_at,
        last_used_at: .credential_accessed_at
      }
  else
    {
      owner: .owner.login,
      description: (.token_name // "fine-grained token \(.token_id)"),
      expires_at: .token_expires_at,
      external_id: "fine-grained-\(.token_id)",
      created_at: .access_granted_at,
      last_used_at: .token_last_used_at
    }
  end
| .emails = $emails[.owner]
